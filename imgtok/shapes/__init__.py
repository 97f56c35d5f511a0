"""The built-in world of shapes: scenes, pictures, captions, and who reads them back."""
