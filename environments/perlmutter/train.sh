#SBATCH --constraint=gpu
export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
export CROSSFL_LAUNCHER="srun --kill-on-bad-exit=1 --cpus-per-task=<cpus>"
