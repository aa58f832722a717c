-- The databases of the stack. The image of PostgreSQL runs this once, on an empty volume; on RDS it is run by hand with psql.
-- \getenv keeps the passwords out of this file and out of the process list.
\set ON_ERROR_STOP on
\getenv prefect_password PREFECT_DATABASE_PASSWORD
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
-- Together, so that a variable that is not set leaves nothing behind.
BEGIN;
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
-- An administrator who is no superuser, as on RDS, may only give a database to a role that it belongs to.
GRANT prefect, mlflow TO CURRENT_USER;
COMMIT;
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE mlflow OWNER mlflow;
