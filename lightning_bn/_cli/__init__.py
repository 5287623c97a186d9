"""The console command ``lightning-bn``: a file for each subcommand, which imports torch when it runs and not before."""
