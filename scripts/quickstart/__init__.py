"""What only scripts/quickstart.sh needs; its classifier is trained by evaluations/c2i/train_classifier.py."""
