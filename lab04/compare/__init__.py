"""What is said of an artefact beside FP32."""
