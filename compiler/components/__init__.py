"""The networks around a denoiser: text encoders and the halves of a VAE, exported, quantized, measured and written."""
