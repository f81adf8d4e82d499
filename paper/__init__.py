"""The paper's figures on real data from packages: small CLIPs learn drawings and their names, and are judged as the paper's."""
