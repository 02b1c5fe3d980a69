import argparse
import sys

from . import kernels

parser = argparse.ArgumentParser(prog="python -m bertfast.kernels")
parser.add_argument("--archs")
parser.add_argument("--json", action="store_true")
parser.add_argument("--op")
parser.add_argument("--update-budget", action="store_true")
args = parser.parse_args()
sys.exit(kernels(args.archs and args.archs.split(","), args.json, args.op, args.update_budget))
