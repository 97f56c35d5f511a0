"""Networks that look at images and are not trained here: DINOv2, Inception."""
