"""Images, videos and sounds: what they are called, and how they are decoded."""
