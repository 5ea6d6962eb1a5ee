"""The prediction: a coordinator hands out blocks, workers compute them."""
