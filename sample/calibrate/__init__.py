"""`imgtok calibrate`: what the latents of an autoencoder need to be rounded one by one, and a page that shows it."""
