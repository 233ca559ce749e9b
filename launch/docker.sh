#!/usr/bin/env bash
# dstrain's image with what people forget: GPUs, shared memory, limits, your own user, folders that outlive the container.
#
#   launch/docker.sh run --zero 2 --pipeline 4    any dstrain command, on this machine
#
# Several machines, with this folder on a disk that all of them have, under the same path:
#
#   launch/docker.sh keys                         once: a key for you and one for the nodes, in ./ssh
#   launch/docker.sh node node1                   on each machine, with its own name: the image's sshd, until stopped
#   docker exec -it node1 dstrain run --hostfile hostfile --pipeline 4    on the first; hostfile: `node1 slots=8` ...
#   docker rm --force node1                       on each: the end
#
# The current folder is /work in the container: configs, data and models below it are found by relative paths, and
# runs/ and cache/ appear in it. What else it takes from the environment:
#
#   DOCKER=podman             the engine (docker, else podman, as found)
#   IMAGE=dstrain             the image
#   MOUNT=/texts:/models      folders elsewhere, to be read under the same path
#   SHM_SIZE=8g               /dev/shm, through which NCCL and torch's workers talk; an engine gives 64 MB
#   NETWORK=host              of nodes: the machine's own, where its names hold, or one that was made with `docker network
#                             create`: a bridge for nodes on one machine, an overlay for several; node names are known in it
#   PORT=2222                 of the nodes' sshd, when keys are made
#   ADDRESS=10.0.0.4          of a node: the address that its sshd listens on, or several, with spaces; by default those
#                             of its name
#   DOCKER_OPTIONS="..."      more options of `docker run`
set -euo pipefail

fail() {
    echo "docker.sh: $1" >&2
    exit 2
}

DOCKER=${DOCKER:-$(command -v docker || command -v podman || true)}
[ -n "$DOCKER" ] || fail "neither docker nor podman is installed"
command -v "$DOCKER" >/dev/null || fail "DOCKER: there is no program '$DOCKER'"
IMAGE=${IMAGE:-dstrain}
[ $# -gt 0 ] || fail "see the first lines of $0"

# Files get your own user as their owner; root's containers run as the image's user.
user=$(id -u) group=$(id -g)
[ "$user" != 0 ] || user=10001 group=10001
own() { [ "$(id -u)" != 0 ] || chown "$user:$group" "$@"; }

# What is made here is not the user's to commit, keys least of all.
make_folder() {
    if [ ! -d "$1" ]; then
        mkdir -m "$2" "$1"
        [ "$1" = runs ] || echo '*' >"$1/.gitignore"
    fi
    own "$1"
}
options=(
    --user "$user:$group"
    --volume "$PWD:/work"
    # Nothing else is written: not into the image, and not with rights that a training needs.
    --read-only --tmpfs "/tmp:exec,mode=1777"
    --cap-drop ALL --security-opt no-new-privileges
    --shm-size "${SHM_SIZE:-8g}"
    # A rank opens a file for each part of the data and a socket for each adjacent rank.
    --ulimit "nofile=$(ulimit -Hn)"
)
case "$("$DOCKER" --version)" in
    podman*)
        # Without this the user in the container is another one outside, and SELinux keeps it from the folders.
        options+=(--security-opt label=disable)
        [ "$(id -u)" = 0 ] || options+=(--userns=keep-id)
        gpus=(--device nvidia.com/gpu=all)
        ;;
    *) gpus=(--gpus all) ;;
esac
if [ "${DS_ACCELERATOR:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
    smi=0
    nvidia-smi >/dev/null 2>&1 || smi=$?
    case $smi in
        0) options+=("${gpus[@]}") ;;
        6 | 9) ;; # no GPU, no driver
        *) fail "nvidia-smi fails with exit code $smi; DS_ACCELERATOR=cpu trains on the CPU" ;;
    esac
fi
# InfiniBand: NCCL locks memory for it.
[ ! -d /dev/infiniband ] || options+=(--device /dev/infiniband --ulimit memlock=-1)
IFS=: read -ra mounts <<<"${MOUNT:-}"
for folder in "${mounts[@]}"; do
    [[ $folder = /* ]] || fail "MOUNT: $folder is no absolute path"
    [ -e "$folder" ] || fail "MOUNT: there is no $folder"
    options+=(--volume "$folder:$folder:ro")
done
for name in CUDA_VISIBLE_DEVICES DS_ACCELERATOR HF_TOKEN OMP_NUM_THREADS; do
    [ -z "${!name:-}" ] || options+=(--env "$name") # by its name: the value stands in no command line
done
read -ra more <<<"${DOCKER_OPTIONS:-}"
options+=("${more[@]}")

# The image and its folders. Which image it is can't be seen from inside.
get_ready() {
    local digest='{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}'
    "$DOCKER" image inspect "$IMAGE" >/dev/null 2>&1 || "$DOCKER" pull "$IMAGE" >&2 || fail "there is no image $IMAGE"
    options+=(--env "DSTRAIN_IMAGE=$("$DOCKER" image inspect --format "$digest" "$IMAGE")")
    make_folder runs 700
    make_folder cache 700
}

case $1 in
    keys)
        [ ! -e ssh ] || fail "./ssh is there already"
        command -v ssh-keygen >/dev/null || fail "there is no ssh-keygen (Debian: apt-get install openssh-client)"
        make_folder ssh 700
        ssh-keygen -q -t ed25519 -N '' -C dstrain -f ssh/id_ed25519
        ssh-keygen -q -t ed25519 -N '' -C dstrain-node -f ssh/host_ed25519_key
        cp ssh/id_ed25519.pub ssh/authorized_keys
        # Whatever its name, a node is one that has this key.
        echo "* $(cut -d' ' -f1,2 ssh/host_ed25519_key.pub)" >ssh/known_hosts
        echo "Port ${PORT:-2222}" >ssh/config
        # sshd and ssh look up who they run as.
        printf 'root:x:0:0:root:/root:/bin/sh\ndstrain:x:%s:%s::/tmp:/bin/bash\n' "$user" "$group" >ssh/passwd
        own ssh ssh/*
        ;;
    node)
        [ -n "${2:-}" ] && [ $# = 2 ] || fail "node wants one word more: the name by which the others find this machine"
        [ -d ssh ] || fail "there is no ./ssh: \`docker.sh keys\` makes it"
        get_ready
        network=${NETWORK:-host}
        address=${ADDRESS:-}
        if [ "$network" != host ]; then
            options+=(--hostname "$2")
        elif [ -z "$address" ]; then
            # Here, and not in the container, where the engine writes the names of /etc/hosts.
            address=$(getent ahosts "$2" | awk '!/^(127\.|::1 )/ && !seen[$1]++ { printf "%s ", $1 }' || true)
            [ -n "$address" ] || fail "$2 has no address here that others reach: ADDRESS=... says which one they use"
        fi
        [ -z "$address" ] || options+=(--env "DSTRAIN_ADDRESS=$address")
        # Without --rm: what a node that did not start has said is still there, `docker logs` shows it.
        exec "$DOCKER" run "${options[@]}" --detach --name "$2" --network "$network" --volume "$PWD/ssh:/ssh:ro" \
            --volume "$PWD/ssh/passwd:/etc/passwd:ro" --entrypoint dstrain-node "$IMAGE"
        ;;
    *)
        get_ready
        [ ! -t 0 ] || [ ! -t 1 ] || options+=(--interactive --tty)
        exec "$DOCKER" run --rm "${options[@]}" "$IMAGE" "$@"
        ;;
esac
