"""`imgtok complexity`: how many tokens images need, what that depends on, and a page that shows it."""
