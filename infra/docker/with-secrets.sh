#!/bin/sh
# Secrets come as files: NAME_FILE=/run/secrets/x becomes NAME, for the one command that is started here.
set -eu
for entry in $(env | sed -n 's/^\([A-Z][A-Z0-9_]*\)_FILE=.*/\1/p'); do
    eval "path=\${${entry}_FILE}"
    case "$path" in
        /run/secrets/*) ;;
        *) continue ;;
    esac
    if ! [ -r "$path" ]; then
        echo "with-secrets: $path, named by ${entry}_FILE, cannot be read" >&2
        exit 2
    fi
    eval "$entry=\$(cat \"\$path\")"
    export "${entry?}"
done
exec "$@"
