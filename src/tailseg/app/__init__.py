"""The web page: pictures of a user, the validation set, the server that shows both."""
