"""A real model reads real people: what their own history contributes to their words, and texts in two voices."""
