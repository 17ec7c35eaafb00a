"""Running an evaluation: images, members, variants, and the one loop."""
