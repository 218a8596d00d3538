"""`python run.py`: compose model x method x reward x benchmark and run one task. `python run.py --help` says what there is."""

from t2i_rl.command.start import main

if __name__ == "__main__":
    main()
