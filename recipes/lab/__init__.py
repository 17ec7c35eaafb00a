"""What the recipes share and no user of the library needs: options, sweeps, benchmarks, the paper's figures."""
