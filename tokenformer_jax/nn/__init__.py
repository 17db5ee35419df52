"""The network: Pattention, the parts around it, the language model and its loss."""
