"""`imgtok evaluate shapes`: whether objects that a prompt names appear, and carry their own attributes."""
