"""The local control plane: strict, scripted, with its own copy of the wire so that judge and codec share no mistake."""
