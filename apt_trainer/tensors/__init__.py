"""Parameters wherever their pieces are: whole, partitioned by DeepSpeed, or sharded by FSDP2."""
