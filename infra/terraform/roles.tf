# One role for the MLflow server (the bucket of artifacts) and one for what runs flows (the bucket of the data): a job cannot
# touch a registered model but through the MLflow server, which asks it for a password.
locals {
  roles = {
    server = "mlflow"
    worker = "sae"
  }
}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]

    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "bucket" {
  for_each = local.roles

  statement {
    sid       = "Bucket"
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.this[each.value].arn]
  }

  statement {
    sid = "Objects"
    actions = [
      "s3:GetObject",
      "s3:PutObject",
      "s3:DeleteObject",
      "s3:AbortMultipartUpload",
      "s3:ListMultipartUploadParts",
    ]
    resources = ["${aws_s3_bucket.this[each.value].arn}/*"]
  }
}

resource "aws_iam_role" "this" {
  for_each = local.roles

  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.trust.json
}

resource "aws_iam_role_policy" "bucket" {
  for_each = local.roles

  name   = "bucket"
  role   = aws_iam_role.this[each.key].id
  policy = data.aws_iam_policy_document.bucket[each.key].json
}

resource "aws_eks_pod_identity_association" "this" {
  for_each = var.cluster_name == null ? {} : local.roles

  cluster_name    = var.cluster_name
  namespace       = var.namespace
  service_account = "sae-${each.key}"
  role_arn        = aws_iam_role.this[each.key].arn
}
