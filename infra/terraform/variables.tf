variable "name" {
  description = "Start of every name, and the tag `project`."
  type        = string
  default     = "sae-foundry"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,30}$", var.name))
    error_message = "name takes 3 to 31 lower-case letters, digits and dashes, a letter first."
  }
}

variable "region" {
  description = "AWS region."
  type        = string
}

variable "bucket_prefix" {
  description = "What makes the names of the buckets unique in all of AWS: <bucket_prefix>-sae and <bucket_prefix>-mlflow."
  type        = string
}

variable "storage_prefix" {
  description = "Prefix of SAE_STORAGE_ROOT inside the bucket, without a slash at the end: s3://<bucket>/<storage_prefix>."
  type        = string
  default     = "foundry"
}

variable "activation_retention_days" {
  description = "Days after which activation datasets are deleted. They can be extracted again with the same bytes; an SAE does not need its own any more. 0 keeps them."
  type        = number
  default     = 90

  validation {
    condition     = var.activation_retention_days == 0 || var.activation_retention_days >= 7
    error_message = "activation_retention_days is 0 (keep) or at least 7: a run that is still training would lose what it reads."
  }
}

variable "vpc_id" {
  description = "VPC of the database."
  type        = string
}

variable "database_subnet_ids" {
  description = "Private subnets of the database, in two availability zones or more."
  type        = list(string)

  validation {
    condition     = length(var.database_subnet_ids) >= 2
    error_message = "RDS wants subnets in at least two availability zones."
  }
}

variable "database_client_security_group_ids" {
  description = "Security groups of what connects to the database: the nodes that run the Prefect and MLflow servers."
  type        = set(string)
}

variable "database_version" {
  description = "Major version of PostgreSQL; the tests run on 15."
  type        = string
  default     = "15"
}

variable "database_instance_class" {
  description = "Size of the database."
  type        = string
  default     = "db.t4g.medium"
}

variable "database_multi_az" {
  description = "A standby in a second availability zone, which takes over by itself; it doubles the price of the database."
  type        = bool
  default     = false
}

variable "database_storage_gb" {
  description = "Storage at the start and the limit to which it grows by itself, in GB."
  type = object({
    initial = number
    maximum = number
  })
  default = {
    initial = 20
    maximum = 200
  }
}

variable "cluster_name" {
  description = "EKS cluster (with the Pod Identity agent) whose service accounts get the roles; null leaves that to you."
  type        = string
  default     = null
}

variable "namespace" {
  description = "Namespace of the service accounts sae-server and sae-worker (infra/kubernetes/base.yaml)."
  type        = string
  default     = "sae-foundry"
}
