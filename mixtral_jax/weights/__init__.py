"""Released weights in and out: Hugging Face's and Mistral's formats, tensor by tensor."""
