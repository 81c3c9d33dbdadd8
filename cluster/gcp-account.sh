#!/usr/bin/env bash
# What gcp.yaml stands on in a Google project, made once: who may reach the machines, and what the machines may do.
#   bash cluster/gcp-account.sh PROJECT REGION BUCKET OPERATOR_CIDR      (like my-project us-west1 my-bucket 203.0.113.0/24)
# Run as an owner of the project. A network of our own: the default one lets the whole internet in by ssh.
set -euo pipefail
[ $# -eq 4 ] || { sed -n 3p "$0" >&2; exit 2; }
project=$1 region=$2 bucket=$3 operator=$4
case $operator in */0) echo "$operator is the whole internet" >&2; exit 2 ;; */*) ;; *) echo "$operator: give a range, a.b.c.d/n" >&2; exit 2 ;; esac
g() { gcloud --project "$project" --quiet "$@"; }

g compute networks create millstream --subnet-mode=custom
g compute networks subnets create millstream --network=millstream --region="$region" --range=10.10.0.0/20 \
  --enable-private-ip-google-access
g compute firewall-rules create millstream-ssh --network=millstream --allow=tcp:22 --source-ranges="$operator" \
  --target-tags=millstream
g compute firewall-rules create millstream-inside --network=millstream --allow=tcp,udp,icmp \
  --source-tags=millstream --target-tags=millstream

worker=millstream-worker@$project.iam.gserviceaccount.com head=millstream-head@$project.iam.gserviceaccount.com
g iam service-accounts create millstream-worker
g iam service-accounts create millstream-head
for account in "$worker" "$head"; do # the bucket, and nothing else of storage
  g storage buckets add-iam-policy-binding "gs://$bucket" --member="serviceAccount:$account" \
    --role=roles/storage.objectUser
done
# The head starts and ends machines, and gives workers their account; Ray's own roles would be compute.admin and
# objectAdmin on the whole project.
g projects add-iam-policy-binding "$project" --member="serviceAccount:$head" --role=roles/compute.instanceAdmin.v1 \
  --condition=None
g iam service-accounts add-iam-policy-binding "$worker" --member="serviceAccount:$head" \
  --role=roles/iam.serviceAccountUser
