"""From continuous vectors to token ids and back."""
