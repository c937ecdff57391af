#!/bin/sh
# Random secrets for infra/compose.yaml, once: what is there stays as it is.
set -eu
folder=${1:-${DEEPZERO_SECRETS:-$(dirname "$0")/secrets}}
umask 077
mkdir -p "$folder"
for name in prefect_db_password mlflow_db_password prefect_auth; do
    [ -e "$folder/$name" ] && continue
    secret=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
    [ "$name" = prefect_auth ] && secret="deepzero:$secret"
    printf %s "$secret" > "$folder/$name"
    # The folder is closed; the file has to be readable for the user inside the container.
    chmod 0444 "$folder/$name"
done
