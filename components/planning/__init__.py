"""What a run takes where it does not fit here: memory per rank, ranks, bytes, requests, hours and cost."""
