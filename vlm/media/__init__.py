"""Images, videos and sounds: their types and their decoding."""
