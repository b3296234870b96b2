"""Models of other projects, made ours."""
