. <venv>/bin/activate || exit 1
{{streamflow_command}}
