
# What every job ends with. $HOME moves into the job's folder, so caches need a place of their own.
module load <modules>
export OMP_NUM_THREADS=<cpus>
export HF_HOME=<workdir>/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
export CROSSFL_FACILITY=<facility> CROSSFL_DATA=<data>
export CROSSFL_STATE=<workdir>/state
CROSSFL_STAGING=$(printenv <staging> || echo <staging>); export CROSSFL_STAGING
export CROSSFL_MODELS=<models>
export CROSSFL_PROMPTS=1 # prompts: <prompts>
export CROSSFL_MIN_VALIDATION_SAMPLES=<min_samples>
export CROSSFL_MIN_VALIDATION_TOKENS=<min_tokens>
# What ends the job early is told to the ranks, which deliver; bash has to live until they have.
trap : TERM USR1
