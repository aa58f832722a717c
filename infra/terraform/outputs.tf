output "sae_bucket" {
  description = "Bucket of the data."
  value       = aws_s3_bucket.this["sae"].id
}

output "storage_root" {
  description = "SAE_STORAGE_ROOT."
  value       = "s3://${aws_s3_bucket.this["sae"].id}/${var.storage_prefix}"
}

output "mlflow_bucket" {
  description = "Bucket of MLflow's artifacts."
  value       = aws_s3_bucket.this["mlflow"].id
}

output "database_address" {
  description = "Host of PostgreSQL."
  value       = aws_db_instance.this.address
}

output "database_secret_arn" {
  description = "Secret with the administrator's password, for the one run of infra/postgres/init.sql."
  value       = aws_db_instance.this.master_user_secret[0].secret_arn
}

output "role_arns" {
  description = "Roles of the MLflow server and of the jobs."
  value       = { for name, role in aws_iam_role.this : name => role.arn }
}
