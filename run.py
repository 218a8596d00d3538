"""`python run.py`: compose model x method x reward x benchmark and run one task; `--help` says what there is."""

from t2i_rl.command.cli import main

if __name__ == "__main__":
    main()
