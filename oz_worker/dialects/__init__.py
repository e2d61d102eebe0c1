"""Control planes' wire formats: frame to engine command, engine report to frame."""
