"""The public easy-VQA dataset."""
