#!/usr/bin/env bash
# The HTTP endpoints with curl: examples/curl.sh MODEL [URL]
set -euo pipefail
model=${1:?usage: $0 MODEL [URL]}
url=${2:-http://localhost:8000}

echo "-- the whole answer at once"
curl -sS --fail-with-body "$url/v2/models/$model/generate" -d '{
    "text_input": "Once upon a time", "max_tokens": 16, "return_finish_reason": true}'
echo

echo "-- as it comes: server-sent events, one JSON object each"
curl -sS --fail-with-body --no-buffer "$url/v2/models/$model/generate_stream" -d '{
    "text_input": "Once upon a time", "max_tokens": 16, "stream": true,
    "temperature": 0.8, "top_p": 0.95, "seed": 7, "stop_words": ["\n\n", "The end"]}'

echo "-- a conversation, by the chat template of the model; five seconds at most (timeout is in microseconds)"
curl -sS --fail-with-body "$url/v2/models/$model/generate" -d '{
    "messages": "[{\"role\": \"user\", \"content\": \"Hello!\"}]", "max_tokens": 16, "timeout": 5000000}'
echo

echo "-- an error: HTTP status 400 and one line"
curl -sS "$url/v2/models/$model/generate" -d '{"text_input": "x", "max_tokens": 0}'
echo
