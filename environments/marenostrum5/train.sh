#SBATCH --exclusive
module purge || exit 1
export CROSSFL_LAUNCHER="srun --kill-on-bad-exit=1 --cpus-per-task=<cpus>"
