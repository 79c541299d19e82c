#!/usr/bin/env bash
# Creates what a mi_ray cluster needs in a Google Cloud project: a private bucket for runs, a network that admits only SSH
# from your network, and service accounts without keys for the head and the workers.
#   cluster/gcp/account.sh PROJECT BUCKET YOUR.ADDRESS/32
# It can be run again after an error or a change: existing objects are kept.
set -euo pipefail
if [[ $# != 3 || ! $3 =~ ^[0-9]+(\.[0-9]+){3}/(3[0-2]|[12][0-9]|[89])$ ]]; then
  echo "usage: $0 PROJECT BUCKET NETWORK, the last no wider than /8, such as 203.0.113.7/32" >&2
  exit 2
fi
project=$1 bucket=gs://$2 admin=$3
region=us-central1 # also of the bucket: data from another region is slow and its traffic costs money
email() { echo "$1@$project.iam.gserviceaccount.com"; }
run() { gcloud --project="$project" --quiet "$@"; }
there() { run "$@" > /dev/null 2>&1; }

run services enable compute.googleapis.com iam.googleapis.com cloudresourcemanager.googleapis.com storage.googleapis.com

there compute networks describe mi-ray || run compute networks create mi-ray --subnet-mode=custom
there compute networks subnets describe mi-ray --region="$region" ||
  run compute networks subnets create mi-ray --network=mi-ray --region="$region" --range=10.10.0.0/20
there compute firewall-rules describe mi-ray-inside ||
  run compute firewall-rules create mi-ray-inside --network=mi-ray --allow=tcp,udp,icmp --source-ranges=10.10.0.0/20
if there compute firewall-rules describe mi-ray-ssh; then
  run compute firewall-rules update mi-ray-ssh --source-ranges="$admin"
else
  run compute firewall-rules create mi-ray-ssh --network=mi-ray --allow=tcp:22 --source-ranges="$admin"
fi
there storage buckets describe "$bucket" ||
  run storage buckets create "$bucket" --location="$region" --uniform-bucket-level-access --public-access-prevention

# Ray's launcher creates ray-autoscaler-sa-v1 at the first `ray up`, with roles as wide as compute.admin. cluster.yaml
# cannot change this. The cluster does not use this account, so it is created here and disabled.
for name in mi-ray-head mi-ray-worker ray-autoscaler-sa-v1; do
  there iam service-accounts describe "$(email $name)" || run iam service-accounts create "$name"
done
run iam service-accounts disable "$(email ray-autoscaler-sa-v1)"

# Both read and write runs. Arrow also checks that the bucket exists, which needs the second role.
for name in mi-ray-head mi-ray-worker; do
  for role in roles/storage.objectUser roles/storage.legacyBucketReader; do
    run storage buckets add-iam-policy-binding "$bucket" --member="serviceAccount:$(email $name)" --role="$role"
  done
done

# The head creates and deletes machines, and starts them with the account of the workers.
permissions=compute.disks.create,compute.subnetworks.use,compute.subnetworks.useExternalIp,compute.zoneOperations.get
for verb in create delete get list setLabels setMetadata setServiceAccount setTags start stop; do
  permissions+=,compute.instances.$verb
done
verb=create
if there iam roles describe miRayHead; then verb=update; fi
run iam roles $verb miRayHead --title="mi_ray head" --stage=GA --permissions="$permissions"
run projects add-iam-policy-binding "$project" --member="serviceAccount:$(email mi-ray-head)" \
  --role="projects/$project/roles/miRayHead" --condition=None
run iam service-accounts add-iam-policy-binding "$(email mi-ray-worker)" \
  --member="serviceAccount:$(email mi-ray-head)" --role=roles/iam.serviceAccountUser
