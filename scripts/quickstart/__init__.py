"""What only scripts/quickstart.sh needs: its images, and the classifier whose features its
metrics use.
"""
