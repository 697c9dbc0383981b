# The image is entered once; in it are no srun and no mpiexec: its torchrun starts the ranks of a node.
export CROSSFL_LAUNCHER="torchrun --standalone --nproc-per-node=<ranks>"
enter=$(command -v apptainer || command -v singularity) || {
    echo "neither apptainer nor singularity is here: load its module" >&2
    exit 1
}
gpu=
[ ! -e /dev/nvidiactl ] || gpu=--nv
[ ! -e /dev/kfd ] || gpu=--rocm
folders=<workdir>
folders=$folders,<data>:<data>:ro
folders=$folders${CROSSFL_STAGING:+,$CROSSFL_STAGING}
folders=$folders,<models>:<models>:ro
folders=$folders,<state>
unset PYTHONPATH PYTHONHOME
step=$(cat <<'CROSSFL_STEP'
{{streamflow_command}}
CROSSFL_STEP
)
"$enter" exec ${gpu:+"$gpu"} --bind "$folders" <container> bash -c "trap : TERM USR1; $step"
