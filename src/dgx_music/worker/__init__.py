"""The worker: claims generations, has an engine make them, stores the audio, completes the rows."""
