"""No test asserts a time, so neither may hypothesis, whose examples have 200 ms each by default."""

from hypothesis import settings

settings.register_profile("quantmill", deadline=None)
settings.load_profile("quantmill")
