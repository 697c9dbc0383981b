#PBS -N crossfl
#PBS -A <account>
#PBS -q <queue>
#PBS -l select=<nodes>:<chunk>
#PBS -l walltime=<time>
#PBS -l filesystems=<filesystems>
#PBS -l <directives>
