"""The reasoner, the weaver and the trigger, and the model that composes them."""
