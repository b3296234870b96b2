"""Models on the Hugging Face hub: pushed with a model card, pulled through the reader of model files."""

from tailseg.hub.card import model_card
from tailseg.hub.transfer import pull, push

__all__ = ["model_card", "pull", "push"]
