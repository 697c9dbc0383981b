
# What every job ends with; of two lines that set the same, the later one counts. $HOME moves into the
# job's folder, so caches need a place of their own.
module load <modules> || exit 1
export OMP_NUM_THREADS=<cpus>
export OMP_NUM_THREADS=<threads>
export http_proxy=<proxy> https_proxy=<proxy> no_proxy=localhost,127.0.0.1
export HF_HOME=<workdir>/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
export CROSSFL_FACILITY=<facility> CROSSFL_DATA=<data>
# What is kept between rounds. Where a site purges its scratch, set `state` to a place that it spares.
export CROSSFL_STATE=<workdir>/state
export CROSSFL_STATE=<state>
CROSSFL_STAGING=$(printenv <staging> || echo <staging>); export CROSSFL_STAGING
export CROSSFL_MODELS=<models>
export CROSSFL_PROMPTS=1 # prompts: <prompts>
export CROSSFL_LOGS=1 # logs: <logs>
export CROSSFL_MIN_VALIDATION_SAMPLES=<min_samples>
export CROSSFL_MIN_VALIDATION_TOKENS=<min_tokens>
# What ends the job early is told to the ranks, which deliver; bash has to live until they have.
trap : TERM USR1
