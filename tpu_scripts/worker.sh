#!/usr/bin/env bash
# One worker's side of a job: launch.sh, tail.sh and stop.sh run it over ssh. The job is a process
# of its own session, so that it outlives the connection that started it.
#
# Usage: worker.sh run ATTEMPT LINE COMMAND...  starts the command, unless this attempt has been
#                                       started already, and prints its log from that line on, until
#                                       it ends; the last line is then "jaxgrpo-exit CODE", with
#                                       " stopped" after it where stop.sh ended it
#        worker.sh current              prints "ATTEMPT COMMAND" if a job runs
#        worker.sh tail LINES           prints the last lines of the newest job's log, and follows it
#        worker.sh end SECONDS          ends the job: SIGTERM, and after these seconds SIGKILL
#        worker.sh stop SECONDS         the same, and tells a watching launch.sh not to restart it
# State: ~/.jaxgrpo/ATTEMPT/{command,keeper,pid,log,exit,stopped}, and ~/.jaxgrpo/current names the newest.
set -euo pipefail

jobs=$HOME/.jaxgrpo
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

newest() { cat "$jobs/current" 2>/dev/null || true; }

# The keeper of a running attempt holds this lock; it falls when the machine does.
is_alive() { [[ -e $1/lock ]] && ! flock --shared --nonblock "$1/lock" true; }

# keep DIRECTORY COMMAND...: runs the command and writes down how it ended.
keep() {
  local directory=$1 pid code
  shift
  exec 9>"$directory/lock"
  flock 9
  echo "$$" >"$directory/keeper"
  trap : TERM HUP INT # a machine that shuts down signals every process; this one ends last
  cd "$clone"
  PATH=$clone/.venv/bin:$PATH setsid "$@" >>"$directory/log" 2>&1 9>&- &
  pid=$!
  echo "$pid" >"$directory/pid"
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break # else a signal interrupted `wait`
  done
  echo "$code" >"$directory/exit.new"
  mv "$directory/exit.new" "$directory/exit"
}

# end DIRECTORY SECONDS: SIGTERM to the process itself, which ends its children in good order.
end() {
  local directory=$1 pid
  is_alive "$directory" && [[ -s $directory/pid ]] || return 0
  pid=$(<"$directory/pid")
  kill -TERM "$pid" 2>/dev/null || true
  for ((i = 0; i < $2 * 5; i++)); do
    is_alive "$directory" || return 0
    sleep 0.2
  done
  echo "worker.sh: still running $2 s after SIGTERM, killed" >>"$directory/log"
  kill -KILL -- "-$pid" 2>/dev/null || true
  while is_alive "$directory"; do sleep 0.1; done
}

start() {
  local directory=$jobs/$1 before
  shift
  mkdir -p "$jobs"
  before=$(newest)
  mkdir "$directory" 2>/dev/null || return 0 # started already, over a connection since lost
  [[ -z $before ]] || end "$jobs/$before" 10
  : >"$directory/log"
  printf '%s\n' "$*" >"$directory/command"
  basename "$directory" >"$jobs/current"
  setsid "$BASH" "${BASH_SOURCE[0]}" keep "$directory" "$@" >/dev/null 2>&1 </dev/null &
  while [[ ! -s $directory/pid ]]; do sleep 0.05; done
}

# A progress bar rewrites its line: here each state of it becomes a line.
as_lines() { stdbuf --output=L tr --squeeze-repeats '\r' '\n'; }

# The log from a line on until the job ends, then how it ended.
follow() {
  local directory=$1 line=$2 ending until=()
  if is_alive "$directory"; then
    until=(--follow --sleep-interval=0.2 --pid="$(<"$directory/keeper")")
  fi
  tail --lines=+1 "${until[@]}" "$directory/log" | as_lines |
    stdbuf --output=L tail --lines="+$line"
  [[ -z $(tail --bytes=1 "$directory/log" | tr --delete '\r') ]] || echo
  # Without an exit code the machine went down with the job.
  ending=$(cat "$directory/exit" 2>/dev/null || echo 137)
  [[ ! -e $directory/stopped ]] || ending+=" stopped"
  echo "jaxgrpo-exit $ending"
}

case ${1:-} in
  run)
    start "$2" "${@:4}"
    follow "$jobs/$2" "$3"
    ;;
  current)
    attempt=$(newest)
    if [[ -n $attempt ]] && is_alive "$jobs/$attempt"; then
      echo "$attempt $(<"$jobs/$attempt/command")"
    fi
    ;;
  tail)
    attempt=$(newest)
    [[ -n $attempt ]] || { echo "worker.sh: no job has run here" >&2 && exit 1; }
    tail --lines="$2" --follow "$jobs/$attempt/log" | as_lines
    ;;
  end | stop)
    attempt=$(newest)
    [[ -n $attempt ]] || exit 0
    [[ $1 == end ]] || touch "$jobs/$attempt/stopped"
    end "$jobs/$attempt" "$2"
    ;;
  keep) keep "${@:2}" ;;
  *)
    echo "worker.sh: unknown argument ${1:-}; see its first lines" >&2
    exit 2
    ;;
esac
