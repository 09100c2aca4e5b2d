"""Audio files as other programs write them: their true content, whatever their headers say.

A length in a header is a guess: recorders, pipes and cutting tools write none or a wrong one, and a
decoder that believes it ends too early, without an error. So each container is followed to its true
end, and then handed on without any length to believe. A file that stops in the middle, or is
damaged, is refused.
"""
