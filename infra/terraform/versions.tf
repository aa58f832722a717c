terraform {
  required_version = ">= 1.9, < 2.0"

  required_providers {
    # `terraform init` writes .terraform.lock.hcl with the exact version and its checksums: commit it.
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }

  # The state names every resource but holds no password (RDS keeps it in Secrets Manager). Where it is kept is yours to say:
  # terraform init -backend-config=backend.hcl
  backend "s3" {}
}

provider "aws" {
  region = var.region

  default_tags {
    tags = {
      project = var.name
    }
  }
}
