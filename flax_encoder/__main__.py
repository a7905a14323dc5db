from flax_encoder.cli import main

main()
