"""The claims, one file each; see lora_lab.claims."""
